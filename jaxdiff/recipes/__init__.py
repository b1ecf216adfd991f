"""Where mathematics, networks and files meet: training, sampling, judging."""
