"""A lean trainer for Parameter Golf: text → shards → training → int6 artifact → bits per byte → record."""
