"""A recipe's data, looked at before a training: what would spoil it, how often, where, and what to do."""
