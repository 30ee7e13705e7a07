"""The hands: launches, feeds, watches and ends the workers that the controller admitted."""
