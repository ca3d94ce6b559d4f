"""What the chat page and the server have in common: the address, who may call it by which name, secrets, connections."""
