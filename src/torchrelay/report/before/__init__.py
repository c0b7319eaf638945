"""What can be tried before a run: whether it will go through, whether the network can learn, and at which rate."""
