"""The authority: it decides who may be born and who must end."""
