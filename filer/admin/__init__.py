"""The local control plane: messages, the socket that answers them, the client that asks."""
