"""Where instructmix runs: everything that touches Ray, the pipeline driver included."""
