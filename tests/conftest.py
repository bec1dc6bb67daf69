"""Shared fixtures. Tests reach no network: the hub is switched off before anything imports it."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models two threads mostly wait for each other

# A shell starts what runs in its background with Ctrl-C ignored, which children inherit; some tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
