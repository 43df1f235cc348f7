//! Each rule of `apply` by the behaviour that it gives. The fixture checks all invariants after each entry, and that a rejected
//! entry changes nothing.

mod cloning;
mod clusters;
mod duty;
mod endings;
mod govern;
mod groups;
mod hosts;
mod leaving;
mod membership;
mod memory;
mod migrations;
mod networks;
mod pool;
mod queue;
mod random;
mod reclaim;
mod replicas;
mod run;
mod scrubs;
mod services;
mod size;
mod snapshots;
mod users;
mod vms;
