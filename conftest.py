"""Tests run on one thread: their networks are tiny, and a busy machine then slows them far less."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; scripts that tests start inherit it
