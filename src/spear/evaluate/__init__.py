"""How good is it? Closed loop in the simulator, 3D answers against the truth, open loop on real
data. Every number leaves this room with its n and a 95 % interval."""
