"""4-bit weights in the NF4 format of QLoRA (arXiv 2305.14314), laid out as bitsandbytes lays them out."""
