"""The lab: a queue of small distillations that repeats the paper's comparisons on two CPU cores or any GPU."""
