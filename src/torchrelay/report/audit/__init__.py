"""A finished run checked: an audit replays its steps, a bisection finds why two runs part."""
