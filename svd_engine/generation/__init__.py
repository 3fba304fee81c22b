"""From prompts to completions, and scores of given completions."""
