"""A trained run as a folder that can be used without torchrelay, with proof that it answers like the run."""
