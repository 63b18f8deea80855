//! How rows are cut into portions for the disk, the same for both stores.

use tokio::sync::{mpsc, oneshot};

use crate::{Filter, Row, StoreError, Stream, limits};

/// The most rows of one transaction.
pub(crate) const ROWS_MAX: usize = 1_000;
/// The most bytes of one portion, about; a single row may be all of it.
const BYTES_MAX: usize = 1024 * 1024;
/// Portions that may wait: 32 MiB at most. Then who appends waits.
pub(crate) const QUEUE_MAX: usize = 32;
/// Rows removed at a time, so that those who append are not kept waiting for long.
pub(crate) const TRIM_MAX: i64 = 5_000;

/// Rows on their way to the disk, and who waits for them.
pub(crate) struct Portion {
    pub(crate) stream: Stream,
    pub(crate) rows: Vec<Row>,
    pub(crate) answer: oneshot::Sender<Result<(), StoreError>>,
}

/// What a row has to be for a filter: source, kind, severity and cursor are parameters 1 to 4. What is not asked for
/// is not in the statement, so that the database finds the index that fits. `sign` is what marks a parameter.
pub(crate) fn conditions(filter: &Filter, sign: char) -> String {
    let mut conditions = format!("severity >= {sign}3 AND id < {sign}4");
    if filter.source.is_some() {
        conditions.push_str(&format!(" AND source = {sign}1"));
    }
    if filter.kind.is_some() {
        conditions.push_str(&format!(" AND kind = {sign}2"));
    }
    conditions
}

/// Cuts rows into portions.
pub(crate) fn portions(rows: Vec<Row>) -> Result<Vec<Vec<Row>>, StoreError> {
    let mut portions: Vec<Vec<Row>> = Vec::new();
    let mut bytes = 0;
    for row in rows {
        limits::row(&row)?;
        let size = row.source.len() + row.key.len() + row.kind.len() + row.body.len();
        match portions.last_mut() {
            Some(portion) if portion.len() < ROWS_MAX && bytes + size <= BYTES_MAX => {
                bytes += size;
                portion.push(row);
            }
            _ => {
                bytes = size;
                portions.push(vec![row]);
            }
        }
    }
    Ok(portions)
}

/// Puts rows into the queue, waits until all are written.
pub(crate) async fn append(
    queue: &mpsc::Sender<Portion>,
    stream: Stream,
    rows: Vec<Row>,
    gone: impl Fn() -> StoreError,
) -> Result<(), StoreError> {
    let mut waiting = Vec::new();
    for rows in portions(rows)? {
        let (answer, answered) = oneshot::channel();
        queue.send(Portion { stream, rows, answer }).await.map_err(|_| gone())?;
        waiting.push(answered);
    }
    for answered in waiting {
        answered.await.map_err(|_| gone())??;
    }
    Ok(())
}

/// Takes what else waits, up to [`ROWS_MAX`] rows; one portion may be left over for the next time.
pub(crate) fn gather(first: Portion, queue: &mut mpsc::Receiver<Portion>) -> (Vec<Portion>, Option<Portion>) {
    let mut count = first.rows.len();
    let mut together = vec![first];
    while let Ok(portion) = queue.try_recv() {
        if count + portion.rows.len() > ROWS_MAX {
            return (together, Some(portion));
        }
        count += portion.rows.len();
        together.push(portion);
    }
    (together, None)
}
