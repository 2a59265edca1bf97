"""What tests share: a second codec, a peer played by hand, transports that misbehave, links of every kind."""
