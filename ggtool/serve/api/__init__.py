"""The HTTP API: bodies checked by pydantic, one file for each family of endpoints, and the chat protocols over one core."""
