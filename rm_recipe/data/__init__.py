"""Preference data: from files to tokenised comparisons."""
