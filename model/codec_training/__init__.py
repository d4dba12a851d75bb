"""Training a codec of EnCodec's architecture: quantiser, losses, discriminator and one step, in pure PyTorch."""
