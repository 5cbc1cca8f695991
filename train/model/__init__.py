"""The model. Each file defines one component. `train.model.gpt.GPT` assembles them."""
