"""The fast decoder: models as lists of native steps, and what serves requests with them."""
