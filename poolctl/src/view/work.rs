//! Tasks and events.

use super::{percent, utc, words};
use crate::output::Object;
use proto::{TaskId, v1};
use serde::Serialize;

/// A long operation.
#[derive(Debug, Serialize)]
pub struct TaskView {
    id: String,
    // The message calls it `kind`, which in JSON is the kind of the object.
    operation: String,
    state: String,
    phase: String,
    objects: Vec<String>,
    error: String,
    created_ms: u64,
    ended_ms: u64,
    principal: String,
    deadline_ms: u64,
    executor: String,
    request_id: String,
    progress: Option<ProgressView>,
}

/// How far a task is, where that is known.
#[derive(Debug, Serialize)]
struct ProgressView {
    percent: f64,
    done_bytes: u64,
    /// 0: not counted in bytes.
    total_bytes: u64,
    bytes_per_s: u64,
    remaining_ms: Option<u64>,
}

impl From<v1::Task> for TaskView {
    fn from(task: v1::Task) -> Self {
        Self {
            id: TaskId(task.id).to_string(),
            operation: task.kind,
            state: task.state,
            phase: task.phase,
            objects: task.objects,
            error: task.error,
            created_ms: task.created_ms,
            ended_ms: task.ended_ms,
            principal: task.principal,
            deadline_ms: task.deadline_ms,
            executor: task.executor,
            request_id: task.request_id,
            progress: task.progress.map(|progress| ProgressView {
                percent: percent(progress.permille),
                done_bytes: progress.done_bytes,
                total_bytes: progress.total_bytes,
                bytes_per_s: progress.bytes_per_s,
                remaining_ms: progress.remaining_ms,
            }),
        }
    }
}

impl Object for TaskView {
    const KIND: &'static str = "Task";
    const COLUMNS: &'static [&'static str] =
        &["ID", "OPERATION", "OBJECTS", "STATE", "DONE", "PHASE", "ERROR"];
    const WIDE: &'static [&'static str] = &["BY", "EXECUTOR", "CREATED", "DEADLINE", "ENDED"];

    fn name(&self) -> String {
        self.id.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.operation.clone(),
            words(&self.objects),
            self.state.clone(),
            self.progress.as_ref().map(|progress| format!("{}%", progress.percent)).unwrap_or_default(),
            self.phase.clone(),
            self.error.clone(),
            self.principal.clone(),
            self.executor.clone(),
            utc(self.created_ms),
            utc(self.deadline_ms),
            utc(self.ended_ms),
        ]
    }
}

/// Something that happened.
#[derive(Debug, Serialize)]
pub struct EventView {
    revision: u64,
    ordinal: u32,
    time_ms: u64,
    // The message calls it `kind`, which in JSON is the kind of the object.
    event: String,
    object: String,
    message: String,
}

impl From<v1::Event> for EventView {
    fn from(event: v1::Event) -> Self {
        Self {
            revision: event.revision,
            ordinal: event.ordinal,
            time_ms: event.time_ms,
            event: event.kind,
            object: event.object,
            message: event.message,
        }
    }
}

impl Object for EventView {
    const KIND: &'static str = "Event";
    const COLUMNS: &'static [&'static str] = &["TIME", "REVISION", "EVENT", "OBJECT", "MESSAGE"];
    const WIDE: &'static [&'static str] = &["ORDINAL"];

    fn name(&self) -> String {
        self.event.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            utc(self.time_ms),
            self.revision.to_string(),
            self.event.clone(),
            self.object.clone(),
            self.message.clone(),
            self.ordinal.to_string(),
        ]
    }
}
