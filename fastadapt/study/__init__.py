"""Studies of language models built on the public functions of this package."""
