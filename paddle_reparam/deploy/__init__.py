"""From a network in train form to a folder that can be shipped, checked and run."""
