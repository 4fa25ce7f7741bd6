"""The only room that imports transformers and peft.

Where torchao is installed they import it, and it tells of each of its kernels for another build of torch, none of which is used here.
"""

import logging


def _tells_news(record: logging.LogRecord) -> bool:
    """Whether it is more than that."""
    return not record.getMessage().startswith(("Failed to load ", "<enum "))


for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(_tells_news)
