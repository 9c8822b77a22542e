"""The LLaMA that launch/pretrain.py trains: built whole, partitioned by ZeRO 3, or split over a grid of ranks."""
