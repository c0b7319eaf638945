"""Speed and memory, beside a hand-written loop and other frameworks."""
