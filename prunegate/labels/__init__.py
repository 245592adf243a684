"""Labels on removable positions: how they are made, how they flow, and what a traced forward leaves behind."""
