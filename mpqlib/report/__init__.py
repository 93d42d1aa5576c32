"""What a run stores and shows: runs, policies, claims and plots."""
