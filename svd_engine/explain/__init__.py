"""A page that shows, token by token, what steering does."""
