//! Fleets on one machine: benches, kills, cuts.
