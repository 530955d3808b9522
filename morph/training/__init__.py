"""The training engine: one loop over Lightning Fabric for students with and without a teacher."""
