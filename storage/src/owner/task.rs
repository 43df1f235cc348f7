//! The task around an [`Owner`]: turns what happens into inputs, and does what the outputs say.

use super::config::{ActivateError, ActivationStart, ResyncStatus, VolumeConfig, VolumeError, VolumeStatus};
use super::core::{Command, CommandId, Generation, Input, Look, Looked, Output, Owner, Reply, TICK};
use super::link::{FrameSender, LinkEvent, LinkEventKind, LinkTask};
use super::meter::Traffic;
use crate::frames::{FRAMES_MAX, Frame};
use crate::hashed::HashedBlocks;
use crate::types::{Tail, View, VolumeOp};
use crate::wire::Request;
use bytes::Bytes;
use proto::{BlockIndex, HostId, Sequence};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};

/// Events that wait for the task: some per connection.
const EVENTS_MAX: usize = 256;

type Answer<T, E> = oneshot::Sender<Result<T, E>>;

/// What a handle asks for. A permit is a share of a window, given back when the request is over.
pub enum Message {
    Activate {
        config: VolumeConfig,
        start: ActivationStart,
        answer: Answer<Sequence, ActivateError>,
    },
    Update {
        config: VolumeConfig,
    },
    Read {
        view: View,
        first: BlockIndex,
        count: u32,
        answer: Answer<Bytes, VolumeError>,
        permit: OwnedSemaphorePermit,
    },
    Write {
        first: BlockIndex,
        count: u32,
        content: Option<HashedBlocks>,
        answer: Answer<(), VolumeError>,
        permit: OwnedSemaphorePermit,
    },
    Op {
        op: VolumeOp,
        answer: Answer<Tail, VolumeError>,
    },
    Look {
        look: Look,
        answer: Answer<Looked, VolumeError>,
    },
    Repair {
        host: HostId,
        first: BlockIndex,
        data: Bytes,
        answer: Answer<(), VolumeError>,
    },
    Flush {
        answer: Answer<(), VolumeError>,
    },
    Drain {
        answer: Answer<Sequence, VolumeError>,
    },
    Resume,
    Close {
        closed: oneshot::Sender<()>,
    },
}

/// Who waits for the reply to a command.
enum Asker {
    Activate(Answer<Sequence, ActivateError>),
    Read(Answer<Bytes, VolumeError>),
    Done(Answer<(), VolumeError>),
    Op(Answer<Tail, VolumeError>),
    Look(Answer<Looked, VolumeError>),
    Drain(Answer<Sequence, VolumeError>),
}

impl Asker {
    /// The asker may have given up.
    fn tell(self, reply: Reply) {
        match (self, reply) {
            (Self::Activate(answer), Reply::Activated(result)) => _ = answer.send(result),
            (Self::Read(answer), Reply::Read(result)) => _ = answer.send(result),
            (Self::Done(answer), Reply::Done(result)) => _ = answer.send(result),
            (Self::Op(answer), Reply::Operated(result)) => _ = answer.send(result),
            (Self::Look(answer), Reply::Looked(result)) => _ = answer.send(result),
            (Self::Drain(answer), Reply::Drained(result)) => _ = answer.send(result),
            (_, reply) => unreachable!("{reply:?} answers another command"),
        }
    }
}

/// A command under way.
struct UnderWay {
    asker: Asker,
    _permit: Option<OwnedSemaphorePermit>,
}

/// A replica to which a connection is kept.
struct Route {
    task: AbortHandle,
    /// The present connection.
    connection: Option<(Generation, FrameSender)>,
}

/// The task of one volume.
pub struct VolumeTask {
    owner: Owner,
    messages: mpsc::Receiver<Message>,
    events: mpsc::Sender<LinkEvent>,
    inbox: mpsc::Receiver<LinkEvent>,
    published: watch::Sender<VolumeStatus>,
    resyncs: watch::Sender<Vec<ResyncStatus>>,
    generations: Arc<AtomicU64>,
    traffic: Arc<Traffic>,
    routes: HashMap<HostId, Route>,
    tasks: JoinSet<()>,
    under_way: HashMap<CommandId, UnderWay>,
    next_command: u64,
    opened: Instant,
}

impl VolumeTask {
    /// A task for an inactive volume.
    pub fn new(
        owner: Owner,
        messages: mpsc::Receiver<Message>,
        (published, resyncs): (watch::Sender<VolumeStatus>, watch::Sender<Vec<ResyncStatus>>),
        traffic: Arc<Traffic>,
    ) -> Self {
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        Self {
            owner,
            messages,
            events,
            inbox,
            published,
            resyncs,
            generations: Arc::default(),
            traffic,
            routes: HashMap::new(),
            tasks: JoinSet::new(),
            under_way: HashMap::new(),
            next_command: 0,
            opened: Instant::now(),
        }
    }

    /// Runs until the volume is closed or all handles are gone.
    pub async fn run(mut self, config: VolumeConfig) {
        self.command(Command::Update { config }, None);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut messages = Vec::with_capacity(FRAMES_MAX);
        loop {
            tokio::select! {
                count = self.messages.recv_many(&mut messages, FRAMES_MAX) => {
                    if count == 0 {
                        return self.command(Command::Close, None);
                    }
                    if let ControlFlow::Break(closed) = self.take_messages(messages.drain(..)) {
                        // The handle may not wait for it.
                        let _ = closed.send(());
                        return;
                    }
                }
                Some(event) = self.inbox.recv() => self.event(event),
                _ = ticks.tick() => {
                    self.apply(Input::Tick);
                    self.publish_resyncs();
                }
            }
        }
    }

    /// Takes what handles ask for; `Break`: the volume is closed.
    fn take_messages(&mut self, messages: impl Iterator<Item = Message>) -> ControlFlow<oneshot::Sender<()>> {
        let mut commands = Vec::with_capacity(FRAMES_MAX);
        for message in messages {
            if let Message::Close { closed } = message {
                self.apply_all(commands);
                self.command(Command::Close, None);
                return ControlFlow::Break(closed);
            }
            commands.push(self.message(message));
        }
        self.apply_all(commands);
        ControlFlow::Continue(())
    }

    fn message(&mut self, message: Message) -> Input {
        let (command, asker, permit) = match message {
            Message::Activate { config, start, answer } => {
                (Command::Activate { config, start }, Asker::Activate(answer), None)
            }
            Message::Read { view, first, count, answer, permit } => {
                (Command::Read { view, first, count }, Asker::Read(answer), Some(permit))
            }
            Message::Op { op, answer } => (Command::Op { op }, Asker::Op(answer), None),
            Message::Look { look, answer } => (Command::Look { look }, Asker::Look(answer), None),
            Message::Repair { host, first, data, answer } => {
                (Command::Repair { host, first, data }, Asker::Done(answer), None)
            }
            Message::Write { first, count, content, answer, permit } => {
                (Command::Write { first, count, content }, Asker::Done(answer), Some(permit))
            }
            Message::Flush { answer } => (Command::Flush, Asker::Done(answer), None),
            Message::Drain { answer } => (Command::Drain, Asker::Drain(answer), None),
            Message::Update { config } => return self.input(Command::Update { config }, None),
            Message::Resume => return self.input(Command::Resume, None),
            Message::Close { .. } => unreachable!("handled by whoever takes messages"),
        };
        self.input(command, Some(UnderWay { asker, _permit: permit }))
    }

    fn input(&mut self, command: Command, waits: Option<UnderWay>) -> Input {
        let id = CommandId(self.next_command);
        self.next_command += 1;
        if let Some(waits) = waits {
            self.under_way.insert(id, waits);
        }
        Input::Command { id, command }
    }

    fn command(&mut self, command: Command, waits: Option<UnderWay>) {
        let input = self.input(command, waits);
        self.apply(input);
    }

    fn event(&mut self, event: LinkEvent) {
        let LinkEvent { host, generation, kind } = event;
        let Some(route) = self.routes.get_mut(&host) else { return };
        match kind {
            LinkEventKind::Up { incarnation, frames } => {
                route.connection = Some((generation, frames));
                self.apply(Input::Connected { host, generation, incarnation });
            }
            LinkEventKind::Down => {
                route.connection.take_if(|(current, _)| *current == generation);
                self.apply(Input::Disconnected { host, generation });
            }
            LinkEventKind::Frames(frames) => {
                let received = frames.into_iter().map(|Frame { header: response, data }| Input::Received {
                    host,
                    generation,
                    response,
                    data,
                });
                self.apply_all(received);
            }
        }
    }

    fn apply(&mut self, input: Input) {
        self.apply_all([input]);
    }

    fn apply_all(&mut self, inputs: impl IntoIterator<Item = Input>) {
        let outputs = self.owner.handle(self.opened.elapsed(), inputs);
        // Before any reply: whoever is answered must see the state that the answer is about.
        let status = self.owner.status();
        self.published.send_if_modified(|old| std::mem::replace(old, status) != status);
        outputs.into_iter().for_each(|output| self.perform(output));
    }

    /// Not with each input: a look at how far the copies are costs more than most inputs do.
    fn publish_resyncs(&self) {
        let now = self.owner.resyncs();
        self.resyncs.send_if_modified(|before| {
            let is_new = *before != now;
            *before = now;
            is_new
        });
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Connect { host, route } => {
                let sent = self.traffic.to(host);
                let link = LinkTask::new(host, route, self.events.clone(), self.generations.clone(), sent);
                let task = self.tasks.spawn(link.run());
                let replaced = self.routes.insert(host, Route { task, connection: None });
                replaced.into_iter().for_each(|route| route.task.abort());
                while self.tasks.try_join_next().is_some() {}
            }
            Output::Disconnect { host } => {
                self.routes.remove(&host).into_iter().for_each(|route| route.task.abort());
            }
            Output::Drop { host, generation } => {
                if let Some(route) = self.routes.get_mut(&host) {
                    route.connection.take_if(|(current, _)| *current == generation);
                }
            }
            Output::Send { host, generation, request, data } => self.send(host, generation, request, data),
            Output::Reply { id, reply } => {
                if let Some(under_way) = self.under_way.remove(&id) {
                    under_way.asker.tell(reply);
                }
            }
        }
    }

    fn send(&self, host: HostId, generation: Generation, request: Request, data: Bytes) {
        let connection = self.routes.get(&host).and_then(|route| route.connection.as_ref());
        if let Some((_, frames)) = connection.filter(|(current, _)| *current == generation) {
            frames.send(request, data);
        }
    }
}
