"""`splitfuse bench serve`: FastGen's method of measuring a server, and its policies beside each other."""
