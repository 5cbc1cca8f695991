"""Parameter groups, schedules, averages of weights, and the reduction of gradients over ranks."""
