//! Commits that wait, and who waits for them; the same for both stores.

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::{COMMIT_BYTES_MAX, Commit, Committed, StoreError};

/// Commits that may wait; then who commits waits for a place.
pub(crate) const QUEUE_MAX: usize = 1_024;
/// Commits that share one transaction.
const TOGETHER_MAX: usize = 256;

/// A commit on its way.
pub(crate) struct Job {
    /// `None` only asks whether one would go through.
    pub(crate) commit: Option<Commit>,
    pub(crate) bytes: usize,
    /// When it came.
    pub(crate) since: Instant,
    pub(crate) answer: oneshot::Sender<Result<Committed, StoreError>>,
}

/// Takes what else waits, as long as it is not more than the largest commit may be.
pub(crate) fn gather(first: Job, queue: &mut mpsc::Receiver<Job>) -> Vec<Job> {
    let mut bytes = first.bytes;
    let mut batch = vec![first];
    while batch.len() < TOGETHER_MAX
        && bytes < COMMIT_BYTES_MAX
        && let Ok(job) = queue.try_recv()
    {
        bytes += job.bytes;
        batch.push(job);
    }
    batch
}

/// The commits of a batch.
pub(crate) fn commits(batch: &[Job]) -> Vec<&Commit> {
    batch.iter().filter_map(|job| job.commit.as_ref()).collect()
}

/// Tells everybody: `answers` are those to [`commits`], in that order.
pub(crate) fn answer(batch: Vec<Job>, answers: Result<Vec<Result<Committed, StoreError>>, StoreError>) {
    let mut answers = answers.map(Vec::into_iter);
    for job in batch {
        let answer = match &mut answers {
            Err(error) => Err(error.clone()),
            // Generation 0: nothing was to be committed.
            Ok(_) if job.commit.is_none() => Ok(Committed::Now(0)),
            Ok(answers) => answers.next().expect("a plan answers each commit"),
        };
        // Who went away meanwhile finds what became of it by its idempotency key.
        let _ = job.answer.send(answer);
    }
}
