//! Times for people: how long ago, how long until.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Seconds since 1970 as `2026-11-21 23:32:57` (Howard Hinnant's civil-from-days, by arithmetic alone).
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let era = z / 146_097;
    let of_era = z % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3_600, rest % 3_600 / 60, rest % 60)
}

/// Seconds since 1970 of `2026-11-21T23:32:57.123Z`, the one form in which the server writes times.
fn seconds(text: &str) -> Option<u64> {
    let text = text.strip_suffix('Z')?;
    let (date, time) = text.split_once('T')?;
    let numbers = |text: &str, by: char| -> Option<Vec<u64>> {
        text.split(by).map(|part| part.parse().ok()).collect::<Option<Vec<u64>>>().filter(|all| all.len() == 3)
    };
    let (date, time) = (numbers(date, '-')?, numbers(time.split('.').next()?, ':')?);
    let (&[year @ 1970..=9999, month @ 1..=12, day @ 1..=31], &[hour, minute, second]) = (&date[..], &time[..]) else {
        return None;
    };
    // The years begin in March, so that the leap day is the last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let of_era = (year % 400) * 365 + (year % 400) / 4 - (year % 400) / 100 + (153 * month + 2) / 5 + day - 1;
    let days = (year / 400 * 146_097 + of_era).checked_sub(719_468)?;
    Some(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// `3 min ago`, `in 2 days`, `just now`; what is no time stays as it is.
pub fn when(text: &str) -> String {
    seconds(text).map_or_else(|| text.to_owned(), |at| between(at, now()))
}

/// How long ago a moment was, in seconds since 1970.
pub fn since(at: u64) -> String {
    between(at, now())
}

/// A moment with its date: `2026-11-21 23:32:57 (3 min ago)`.
pub fn date(text: &str) -> String {
    seconds(text).map_or_else(|| text.to_owned(), |at| format!("{} UTC ({})", utc(at), between(at, now())))
}

fn between(at: u64, now: u64) -> String {
    let far = at.abs_diff(now);
    let (count, unit) = match far {
        0..=1 => return "just now".to_owned(),
        2..=119 => (far, "s"),
        120..=7_199 => (far / 60, "min"),
        7_200..=172_799 => (far / 3_600, "h"),
        _ => (far / 86_400, "days"),
    };
    if at < now { format!("{count} {unit} ago") } else { format!("in {count} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_shown_as_a_date_and_read_back() {
        for (at, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (951_868_799, "2000-02-29 23:59:59"),
            (1_795_303_977, "2026-11-21 23:32:57"),
        ] {
            assert_eq!(utc(at), text);
            assert_eq!(seconds(&format!("{}.123Z", text.replace(' ', "T"))), Some(at));
        }
        for bad in ["", "never", "2026-11-21", "2026-13-01T00:00:00Z", "2026-11-21T23:32Z", "0001-01-01T00:00:00Z"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn distances_have_one_unit() {
        assert_eq!(between(100, 101), "just now");
        assert_eq!(between(100, 160), "60 s ago");
        assert_eq!(between(100, 400), "5 min ago");
        assert_eq!(between(8_000, 100), "in 2 h");
        assert_eq!(between(0, 864_000), "10 days ago");
    }
}
