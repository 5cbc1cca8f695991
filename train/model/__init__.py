"""The model. Each file has one component; `train.model.gpt.GPT` assembles the components."""
