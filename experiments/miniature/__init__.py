"""How the embedded model is made: its files, its vision tower, its warm-up, its training (`make`)."""
