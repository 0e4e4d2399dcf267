"""One file a method: its curvature beside its formula, and the thin public class."""
