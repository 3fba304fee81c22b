import logging

for _name in ("torchao", "torch.utils._pytree"):  # torchao's remarks on its GPU libraries
    logging.getLogger(_name).setLevel(logging.ERROR)
