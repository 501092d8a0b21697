"""What a GPU computes in one pass where torch would make several, in Triton, which comes with torch."""
