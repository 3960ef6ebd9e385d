"""What stands between a SuperLink and the world, and whether a deployment is sound."""
