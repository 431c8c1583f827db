//! Rate limiters of requests, as the devices know them.

use armlet_api::model;
use armlet_devices::rate::{Bucket, Limits};
use std::time::Duration;

/// What a request says of limits: what it leaves out stays, and a bucket of no size takes one away.
pub(super) fn limits(given: Option<model::Limits>) -> Limits {
    let given = given.unwrap_or_default();
    Limits {
        bandwidth: given.bandwidth.map(bucket),
        ops: given.ops.map(bucket),
    }
}

/// What a request says of a bucket.
pub(super) fn bucket(given: model::TokenBucket) -> Bucket {
    Bucket {
        size: given.size,
        refill_time: Duration::from_millis(given.refill_time),
        one_time_burst: given.one_time_burst.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_the_request() {
        let text = r#"{"bandwidth": {"size": 1000, "refill_time": 250, "one_time_burst": 7}}"#;
        let given = serde_json::from_str(text).expect("limits");
        let limits = limits(Some(given));
        let bandwidth = limits.bandwidth.expect("a bucket");
        assert_eq!((bandwidth.size, bandwidth.one_time_burst), (1000, 7));
        assert_eq!(bandwidth.refill_time, Duration::from_millis(250));
        assert_eq!(limits.ops, None);
        let none = r#"{"ops": {"size": 0, "refill_time": 0}}"#;
        let none = super::limits(serde_json::from_str(none).ok());
        assert!(none.ops.is_some_and(|ops| !ops.is_limit()));
    }
}
