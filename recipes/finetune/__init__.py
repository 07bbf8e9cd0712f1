"""What the recipes share: data, models, the paired trial and the run folder."""
