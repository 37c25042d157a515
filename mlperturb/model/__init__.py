"""How a program sees a photo: preprocessing, networks, checkpoints, compressed views."""
