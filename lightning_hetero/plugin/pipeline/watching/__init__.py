"""Watch the stages of `hetero_pipeline`, and move layers where devices become slower or faster."""
