"""The model, one small file per idea; `train.model.gpt.GPT` puts them together."""
