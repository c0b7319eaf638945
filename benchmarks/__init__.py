"""Programs that check what the docs claim: each prints a table or draws a picture."""
