"""What the adapters of PaddleClas, PaddleSeg and PaddleDetection share; it knows none of them."""
