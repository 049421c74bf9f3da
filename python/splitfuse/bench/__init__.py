"""What `splitfuse bench` runs. Every figure comes with its share of the roof, measured in the same run."""
